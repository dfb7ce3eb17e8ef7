"""Tasks of lm-evaluation-harness on a model in memory, item by item."""
