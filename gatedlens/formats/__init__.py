"""What checkpoints and foreign configs look like: one file a layout, or a library that writes one."""
