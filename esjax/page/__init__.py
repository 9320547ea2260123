"""A page that shows runs side by side: as a file that stands alone, or served and kept up to date."""
