"""The steps themselves, the other entry points, and the sequence that `main` follows."""
