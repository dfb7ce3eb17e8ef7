"""Recipes: one strict YAML file that names every part of a run, and the code that assembles those parts."""
