"""Data: sources, formats, rendering through a chat template, packing, collation. Knows tokenizers; knows no model."""
