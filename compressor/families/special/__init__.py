"""Families outside the library's experts interface, one file each: their layouts and how they are called."""
