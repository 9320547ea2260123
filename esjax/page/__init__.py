"""A page that shows runs side by side: as one file, or served and updated."""
