"""Hugging Face folders: config.json by family, tensors by name, read and written."""
