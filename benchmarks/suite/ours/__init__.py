"""What our side of the cases runs: public ops and models of crocuta, as a user calls them."""
