"""Traces and counts that other engines recorded, turned into runs. No torch is needed, but to read .pt files."""
