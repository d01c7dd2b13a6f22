"""QEMU's own tools as child processes: images are read and written through them, never parsed here."""
