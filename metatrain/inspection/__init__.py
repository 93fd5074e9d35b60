"""`metatrain inspect`: what a checkpoint is, and how it maps the layers of a network."""
