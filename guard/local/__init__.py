"""The local engine: archives served in one process over the open inference protocol, without Java."""
