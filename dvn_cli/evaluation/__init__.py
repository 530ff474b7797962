"""How good networks are: measured on test images, judged and shown."""
