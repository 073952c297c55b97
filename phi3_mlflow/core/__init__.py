"""What everything else stands on: errors, console, progress, the machine, git."""
