"""Who answers: a teacher scores a batch and says, for every target row, what it knows of the next token."""
