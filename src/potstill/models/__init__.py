"""Models and tokenizers of transformers and peft: loaded, taken apart into trunk and head, compared, measured, exported."""
