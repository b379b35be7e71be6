"""Lenses of others, natural language autoencoders above all: their directories, read and written."""
