"""Features: the frozen teacher's outputs for every (sample, view), and calibration inputs."""
