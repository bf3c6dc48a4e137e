"""Many adapters on one frozen base: trained together, as a sweep of settings, or as a fleet of data sets."""
