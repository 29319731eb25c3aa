"""Why a plan is as it is: bounds, offers, families, frontiers, comparisons and remedies."""
