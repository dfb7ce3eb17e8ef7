"""How a server elsewhere is asked: exchanges, strict JSON, patience, an event loop. What teachers and generators behind HTTP share."""
