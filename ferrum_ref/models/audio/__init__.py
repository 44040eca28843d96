"""What sound models have in common: spectrograms, rates, convolutions over time, phonemes."""
