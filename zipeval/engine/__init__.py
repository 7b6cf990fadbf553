"""Let visual tokens leave the sequence. Knows neither the methods nor the model families."""
