"""How any result looks; knows no model."""
