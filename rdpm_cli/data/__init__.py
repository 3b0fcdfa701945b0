"""Data: items in (folders, archives, the built-in digits), pixels, class labels, and pictures out."""
