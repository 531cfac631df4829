"""A listener that keeps what it hears."""

from collections import defaultdict


class Listener:
    def __init__(self):
        self.steps = defaultdict(list)
        """By description, (done, total) of every call."""
        self.sentences = []

    def step(self, description, done, total):
        self.steps[description].append((done, total))

    def say(self, sentence):
        self.sentences.append(sentence)
