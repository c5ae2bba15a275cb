"""Tasks of reasoning-gym and their options, as data: its import takes longer than a check may.

Written by scripts/gym_tasks.py from reasoning-gym 0.1.25; a test holds it equal to the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

ROWS = 500
"""Rows of a task, where neither `size` nor `OTHER_ROWS` says otherwise."""

OTHER_ROWS: Mapping[str, int] = MappingProxyType(
    {
        "advanced_geometry": 50,
        "aiw": 10,
        "circuit_logic": 100,
        "emoji_mystery": 1000,
        "knight_swap": 5,
        "maze": 50,
        "palindrome_generation": 50,
        "simple_geometry": 100,
    }
)

TASKS: Mapping[str, str] = MappingProxyType(
    {
        "ab": "seed size length",
        "acre": "train size seed",
        "advanced_geometry": "min_coord max_coord size seed task_types",
        "aiw": "male_names female_names task_types task_type_weights seed size max_entities",
        "arc_1d": "min_size max_size num_train seed size",
        "arc_agi": (
            "use_train use_eval board_format_opts rotations mirrors use_color_permutation "
            "shuffle_example_order rotations_weights mirrors_weights seed size"
        ),
        "base_conversion": "min_base max_base min_value max_value seed size",
        "basic_arithmetic": (
            "min_terms max_terms min_digits max_digits operators allow_parentheses allow_negation seed "
            "size format_style whitespace"
        ),
        "bf": "seed size difficulty",
        "binary_alternation": "min_n max_n p_solvable size seed",
        "binary_matrix": "min_n max_n p_zero size seed",
        "bitwise_arithmetic": "difficulty seed size",
        "boxnet": (
            "min_row_num max_row_num min_column_num max_column_num min_box_num max_box_num colour_list "
            "seed size"
        ),
        "caesar_cipher": "delimiter min_words max_words min_rotation max_rotation seed size",
        "calendar_arithmetic": "year tasks offset_upper_bound leap_year_range seed size",
        "chain_sum": "min_terms max_terms min_digits max_digits allow_negation seed size",
        "circuit_logic": "min_terms max_terms min_inputs max_inputs neg_prob allow_reuse size seed",
        "codeio": "seed size input_prediction_probability difficulty",
        "coin_flip": "min_trials max_trials allow_exact allow_at_least seed size",
        "color_cube_rotation": "min_rotations max_rotations seed size",
        "complex_arithmetic": "min_real max_real min_imag max_imag operations operations_weights seed size",
        "composite": "size seed datasets",
        "count_bits": "min_n max_n size seed",
        "count_primes": "min_n max_n size seed",
        "countdown": (
            "min_numbers max_numbers min_value max_value min_target max_target operators shuffle seed size"
        ),
        "course_schedule": (
            "min_num_courses max_num_courses min_num_prerequisites max_num_prerequisites "
            "min_cycle_length max_cycle_length p_solvable size seed"
        ),
        "cryptarithm": "min_words max_words allow_leading_zero seed size",
        "decimal_arithmetic": (
            "min_num_decimal_places max_num_decimal_places min_terms max_terms precision seed size"
        ),
        "decimal_chain_sum": (
            "min_terms max_terms min_digits max_digits min_decimal_places max_decimal_places "
            "allow_negation seed size"
        ),
        "dice": "num_dice max_dice_size seed size",
        "emoji_mystery": "size seed min_words_in_sentence max_words_in_sentence",
        "family_relationships": "min_family_size max_family_size male_names female_names seed size",
        "figlet_font": "static_word static_font min_word_len max_word_len space_letters seed size",
        "fraction_simplification": "min_value max_value min_factor max_factor styles seed size",
        "futoshiki": "min_board_size max_board_size min_difficulty max_difficulty seed size",
        "game_of_life": (
            "grid_size_x grid_size_y filled_cells_weights filled_cells simulation_steps seed size"
        ),
        "game_of_life_halting": (
            "grid_size_x grid_size_y difficulty num_oscillators max_simulation_steps seed size"
        ),
        "gcd": "min_numbers max_numbers min_value max_value seed size",
        "graph_color": "num_colors min_num_vertices max_num_vertices edge_probability seed size",
        "group_anagrams": (
            "min_anagram_groups max_anagram_groups min_words_per_group max_words_per_group size seed"
        ),
        "gsm_symbolic": "difficulty seed size",
        "intermediate_integration": (
            "problem_types problem_type_weights seed size linear_lower_bound linear_upper_bound "
            "min_linear_degree max_linear_degree outer_constant_min outer_constant_max min_poly_degree "
            "max_poly_degree symbols operators"
        ),
        "isomorphic_strings": "min_string_length max_string_length p_solvable size seed",
        "jugs": "num_jugs difficulty seed size",
        "kakurasu": "min_rows max_rows min_cols max_cols p_ones seed size max_retries",
        "knight_swap": (
            "min_nodes max_nodes min_pieces max_pieces min_steps max_steps max_attempts seed size "
            "impossible_ratio"
        ),
        "knights_knaves": "n_people depth_constraint width_constraint size seed",
        "largest_island": (
            "min_rows max_rows min_cols max_cols min_num_islands max_num_islands min_island_size "
            "max_island_size size seed"
        ),
        "lcm": "min_numbers max_numbers min_value max_value seed size",
        "leg_counting": "min_animals max_animals min_instances max_instances seed size",
        "letter_counting": "min_words max_words seed size",
        "letter_jumble": (
            "min_word_len max_word_len min_words max_words min_corruption_level max_corruption_level "
            "consecutive_words seed size"
        ),
        "list_functions": "seed size",
        "mahjong_puzzle": "min_num_rounds max_num_rounds size seed",
        "manipulate_matrix": (
            "min_rows min_cols max_rows max_cols min_transforms max_transforms w_rotate w_hmirror "
            "w_vmirror w_dmirror w_cmirror w_map w_crop w_remove_every_nth_row w_remove_every_nth_col "
            "w_zero_divisible size seed"
        ),
        "maze": "min_dist max_dist min_grid_size max_grid_size seed size",
        "mini_sudoku": "min_empty max_empty seed size",
        "modulo_grid": "size_x size_y max_divisor max_target max_holes seed size",
        "n_queens": "n min_remove max_remove size seed",
        "needle_haystack": "min_num_statements max_num_statements seed size",
        "number_filtering": (
            "min_numbers max_numbers min_decimals max_decimals min_value max_value seed size"
        ),
        "number_format": "min_num_candidates max_num_candidates min_n max_n max_delta size seed",
        "number_sequence": "min_terms max_terms min_value max_value max_complexity seed size",
        "number_sorting": "min_numbers max_numbers min_decimals max_decimals min_value max_value seed size",
        "palindrome_generation": "min_length max_length seed size",
        "palindrome_partitioning": (
            "min_string_len max_string_len min_substring_palindrome_len max_substring_palindrome_len "
            "size seed"
        ),
        "path_star": "degree node_range min_path_length max_path_length reversed size seed",
        "polynomial_equations": (
            "min_terms max_terms min_value max_value min_degree max_degree operators seed size"
        ),
        "polynomial_multiplication": (
            "min_terms max_terms min_value max_value min_degree max_degree min_polynomials "
            "max_polynomials variables allow_cross_variable_product allow_multivariate_polynomials "
            "operators seed size"
        ),
        "pool_matrix": "min_rows max_rows min_cols max_cols min_pool_size max_pool_size size seed",
        "power_function": "min_base max_base min_exponent max_exponent size seed",
        "prime_factorization": "min_value max_value seed size",
        "products": "min_terms max_terms min_digits max_digits allow_negation seed size",
        "propositional_logic": (
            "min_vars max_vars min_statements max_statements min_complexity max_complexity seed size"
        ),
        "puzzle24": "operators min_value max_value seed size",
        "quantum_lock": "difficulty seed size",
        "ransom_note": (
            "min_note_length max_note_length min_magazine_length max_magazine_length p_solvable size seed"
        ),
        "rearc": (
            "min_examples max_examples diff_lb diff_ub board_format_opts seed size "
            "rng_difficulty_ranges rng_difficulty_weights pso_difficulty_ranges pso_difficulty_weights"
        ),
        "rectangle_count": "max_rectangles width height seed size",
        "rotate_matrix": "min_n max_n min_rotations max_rotations size seed",
        "rotten_oranges": "min_n max_n p_oranges p_rotten size seed",
        "rubiks_cube": "min_scramble_steps max_scramble_steps cube_size remove_ansi seed size",
        "rush_hour": "min_moves max_moves seed size",
        "self_reference": "difficulty seed size",
        "sentence_reordering": "min_words_in_sentence max_words_in_sentence seed size",
        "shortest_path": "min_rows max_rows min_cols max_cols p_blocked size seed",
        "simple_equations": "min_terms max_terms min_value max_value operators operators_weights seed size",
        "simple_geometry": "min_sides max_sides min_angle max_angle seed size",
        "simple_integration": (
            "min_terms max_terms min_degree max_degree min_bounds max_bounds operators symbols seed size"
        ),
        "sokoban": "min_w min_h max_w max_h min_boxes max_boxes max_depth seed size",
        "spell_backward": "min_word_len max_word_len seed data_file size",
        "spiral_matrix": "min_n max_n size seed",
        "string_insertion": "min_string_length max_string_length size seed",
        "string_manipulation": "min_string_length max_string_length min_num_rules max_num_rules size seed",
        "string_splitting": "min_initial_machines max_initial_machines max_iterations size seed",
        "string_synthesis": "min_initial_blocks max_initial_blocks max_iterations size seed",
        "sudoku": "min_empty max_empty seed size",
        "survo": "min_board_size max_board_size min_empty max_empty min_num max_num seed size",
        "syllogism": (
            "allow_all allow_no allow_some allow_some_not invalid_ratio inversion_probability seed size"
        ),
        "time_intervals": (
            "min_time max_time max_time_difference_seconds min_date max_date max_date_difference_days "
            "task_types seed size"
        ),
        "tower_of_hanoi": "min_disks max_disks min_pegs max_pegs size seed visualize",
        "tsumego": "min_board_size max_board_size max_stones size seed",
        "word_ladder": "min_word_length max_word_length min_chain_length max_chain_length seed size",
        "word_sequence_reversal": "min_words max_words seed size",
        "word_sorting": "min_words max_words min_word_length max_word_length transformation seed size",
        "zebra_puzzles": "num_people num_characteristics seed size",
    }
)
"""Task -> the names of its options, separated by spaces."""
