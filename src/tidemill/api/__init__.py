"""REST: routes, who may use them, and errors as problem+json. The only room that knows HTTP statuses."""
