"""The judge as a product: whom it judges by name, isolated runs, waivers, reports, diagnoses, a suite for pytest."""
