"""The responses that hold the model: drawn, filtered, scored once and kept."""
