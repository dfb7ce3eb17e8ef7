"""Written answers compared or graded by another model: who answers, how the judge is asked, when it is believed, and what is counted."""
