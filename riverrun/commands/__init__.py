"""What the commands do, one module each, imported by the command that runs and by no other."""
