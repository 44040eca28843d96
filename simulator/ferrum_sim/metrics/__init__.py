"""What a run was like: records, figures, confidence intervals, comparisons."""
