"""What every mixer promises, as functions: public, so that users hold their own mixers to the same laws."""
