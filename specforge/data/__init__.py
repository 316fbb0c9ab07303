"""From conversations to token ids and loss masks; the draft vocabulary."""
