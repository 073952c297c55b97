"""What a run is told: entry-point parameters, and the profile that they are laid over."""
