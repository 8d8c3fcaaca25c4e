"""All cases by kind; ``registry`` puts them together."""
