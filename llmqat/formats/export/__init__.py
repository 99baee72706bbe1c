"""Other formats: codes and scales of a packed directory moved into them, one file a format."""
