"""Who writes the text that is learned from: generators that write, and authors that decide who does."""
