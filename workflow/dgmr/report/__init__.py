"""Report: the saved results become flat metrics, curves, an exported student and one HTML page."""
