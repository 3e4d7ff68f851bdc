"""Teacher: whatever timm can load becomes a model artefact; and how the demo teacher was made."""
