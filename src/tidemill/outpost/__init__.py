"""What runs at a site and dials out to the control plane: it carries out the calls of the site's engine there."""
