"""The report: what is known of a plan, in one file of HTML."""
