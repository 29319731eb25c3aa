"""Small models, and an interpreter of layer graphs that shares no code with the planner's."""
