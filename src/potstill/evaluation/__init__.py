"""How good a model is, and how sure of it we are: agreement with a teacher, answers that a program checks, and their uncertainty."""
