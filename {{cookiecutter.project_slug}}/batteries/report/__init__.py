"""Layer 5: the HTML report: run histories, sections, plots and page layout."""
