"""Who answers: sources of signals."""
