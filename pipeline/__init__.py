"""The first stage: prepare a corpus, capture a teacher, compare teachers."""
