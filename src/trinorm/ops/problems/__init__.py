"""What is computed, as a value: what a call's checks come to, and what its launches are made of."""
