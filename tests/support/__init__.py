"""What tests of several families share: when a result counts as right, and formulas in plain torch to compare with."""
