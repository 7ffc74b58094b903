"""What every mixer promises, as functions: public, so that a mixer kept elsewhere can be held to the same laws."""
