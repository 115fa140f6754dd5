"""Results as HTML: each page is one file that needs no network and no script, light or dark, on any screen."""
