-- One row per flight whose arrival is known: what was known at its prediction time, and what became of it,
-- of which dataset.target names one: late, minutes, or punctuality (0 early, 1 on time, 2 late).
-- View: accepted. Parameters: :first and :until, between which the flights lie that are asked for; and
-- :lookback_days, further than which no level and no aircraft's past reaches.
--
-- Rolling levels stand on two grids: ten minutes for the state of the moment, days (cut at 08:00 UTC, when
-- New York sleeps) for habits. An observation moves up to the next point of its grid, a question moves down:
-- so a level holds only what was known, and the windows run over few rows. `seen_at` is the latest
-- observation until then, which is inside a level while it is inside its longest window; `known_at` is the
-- latest inside a row, and must not be after prediction_time.
--
-- A window that slides is what costs most, for each row and each sum; one that only grows costs a sixth.
with flights as (
    select
        *,
        unix_timestamp(prediction_time) as asked,
        unix_timestamp(prediction_time) div 600 as tick,
        (unix_timestamp(prediction_time) - 28800) div 86400 as day,
        from_utc_timestamp(scheduled_at, 'America/New_York') as local_time,
        case when arr_delay > 15 then 1 else 0 end as late
    from accepted
),

questions as (
    select * from flights where scheduled_at >= :first and scheduled_at < :until
),

-- What became known, and when. Delays are clipped: one flight must not be the level of an airport.
-- `gained` is the delay made good in the air, which tells how generous the schedule is.
seen as (
    select
        origin, dest, carrier, flight, unix_timestamp(scheduled_at) as at,
        1 as due, 0 as departed, 0 as dep_delay, 0 as dep_late,
        0 as arrived, 0 as arr_delay, 0 as arr_late, 0 as gained
    from flights
    union all
    select
        origin, dest, carrier, flight, unix_timestamp(departed_at),
        0, 1, least(dep_delay, 180), case when dep_delay > 15 then 1 else 0 end,
        0, 0, 0, 0
    from flights
    where departed_at is not null
    union all
    select
        origin, dest, carrier, flight, unix_timestamp(arrived_at),
        0, 0, 0, 0,
        1, least(arr_delay, 180), late, dep_delay - arr_delay
    from flights
    where arrived_at is not null
),

ticks as (
    select
        origin, dest, carrier, (at + 599) div 600 as tick, at as seen_at,
        due, departed, dep_delay, dep_late, arrived, arr_delay, arr_late
    from seen
    union all
    select origin, dest, carrier, tick, cast(null as bigint), 0, 0, 0, 0, 0, 0, 0
    from questions
),

days as (
    select
        origin, dest, carrier, flight, (at - 28800 + 86399) div 86400 as day, at as seen_at,
        arrived, arr_delay, arr_late, gained
    from seen
    union all
    select origin, dest, carrier, flight, day, cast(null as bigint), 0, 0, 0, 0
    from questions
),

origin_now as (
    select
        origin, tick,
        max(seen_at) over ever as seen_at,
        sum(due) over h1 as due_1h, sum(departed) over h1 as departed_1h,
        sum(dep_delay) over h1 as delay_1h,
        sum(due) over h3 as due_3h, sum(departed) over h3 as departed_3h,
        sum(dep_delay) over h3 as delay_3h, sum(dep_late) over h3 as late_3h,
        sum(due) over h24 as due_24h, sum(departed) over h24 as departed_24h,
        sum(dep_delay) over h24 as delay_24h
    from (
        select
            origin, tick, max(seen_at) as seen_at, sum(due) as due, sum(departed) as departed,
            sum(dep_delay) as dep_delay, sum(dep_late) as dep_late
        from ticks
        group by origin, tick
    ) as line
    window
        ever as (partition by origin order by tick rows between unbounded preceding and current row),
        h1 as (partition by origin order by tick range between 5 preceding and current row),
        h3 as (partition by origin order by tick range between 17 preceding and current row),
        h24 as (partition by origin order by tick range between 143 preceding and current row)
),

carrier_origin_now as (
    select
        carrier, origin, tick,
        max(seen_at) over ever as seen_at,
        sum(due) over h3 as due_3h, sum(departed) over h3 as departed_3h,
        sum(dep_delay) over h3 as delay_3h
    from (
        select
            carrier, origin, tick, max(seen_at) as seen_at, sum(due) as due, sum(departed) as departed,
            sum(dep_delay) as dep_delay
        from ticks
        group by carrier, origin, tick
    ) as line
    window
        ever as (partition by carrier, origin order by tick rows between unbounded preceding and current row),
        h3 as (partition by carrier, origin order by tick range between 17 preceding and current row)
),

carrier_now as (
    select
        carrier, tick,
        max(seen_at) over ever as seen_at,
        sum(departed) over h6 as departed_6h, sum(dep_delay) over h6 as delay_6h,
        sum(arrived) over h24 as arrived_24h, sum(arr_late) over h24 as late_24h
    from (
        select
            carrier, tick, max(seen_at) as seen_at, sum(departed) as departed,
            sum(dep_delay) as dep_delay, sum(arrived) as arrived, sum(arr_late) as arr_late
        from ticks
        group by carrier, tick
    ) as line
    window
        ever as (partition by carrier order by tick rows between unbounded preceding and current row),
        h6 as (partition by carrier order by tick range between 35 preceding and current row),
        h24 as (partition by carrier order by tick range between 143 preceding and current row)
),

dest_now as (
    select
        dest, tick,
        max(seen_at) over ever as seen_at,
        sum(due) over h6 as due_6h, sum(departed) over h6 as departed_6h,
        sum(dep_delay) over h6 as delay_6h,
        sum(arrived) over h6 as arrived_6h, sum(arr_delay) over h6 as arr_delay_6h,
        sum(arrived) over h24 as arrived_24h, sum(arr_late) over h24 as late_24h
    from (
        select
            dest, tick, max(seen_at) as seen_at, sum(due) as due, sum(departed) as departed,
            sum(dep_delay) as dep_delay, sum(arrived) as arrived, sum(arr_delay) as arr_delay,
            sum(arr_late) as arr_late
        from ticks
        group by dest, tick
    ) as line
    window
        ever as (partition by dest order by tick rows between unbounded preceding and current row),
        h6 as (partition by dest order by tick range between 35 preceding and current row),
        h24 as (partition by dest order by tick range between 143 preceding and current row)
),

carrier_habit as (
    select
        carrier, day,
        max(seen_at) over ever as seen_at,
        sum(arrived) over d7 as arrived_7d, sum(arr_late) over d7 as late_7d,
        sum(arrived) over d30 as arrived_30d, sum(arr_late) over d30 as late_30d
    from (
        select carrier, day, max(seen_at) as seen_at, sum(arrived) as arrived, sum(arr_late) as arr_late
        from days
        group by carrier, day
    ) as line
    window
        ever as (partition by carrier order by day rows between unbounded preceding and current row),
        d7 as (partition by carrier order by day range between 6 preceding and current row),
        d30 as (partition by carrier order by day range between 29 preceding and current row)
),

route_habit as (
    select
        origin, dest, day,
        max(seen_at) over ever as seen_at,
        sum(arrived) over d7 as arrived_7d, sum(arr_late) over d7 as late_7d,
        sum(arrived) over d30 as arrived_30d, sum(arr_late) over d30 as late_30d,
        sum(arr_delay) over d30 as delay_30d, sum(gained) over d30 as gained_30d
    from (
        select
            origin, dest, day, max(seen_at) as seen_at, sum(arrived) as arrived,
            sum(arr_late) as arr_late, sum(arr_delay) as arr_delay, sum(gained) as gained
        from days
        group by origin, dest, day
    ) as line
    window
        ever as (partition by origin, dest order by day rows between unbounded preceding and current row),
        d7 as (partition by origin, dest order by day range between 6 preceding and current row),
        d30 as (partition by origin, dest order by day range between 29 preceding and current row)
),

flight_habit as (
    select
        carrier, flight, day,
        max(seen_at) over ever as seen_at,
        sum(arrived) over d30 as arrived_30d, sum(arr_late) over d30 as late_30d,
        sum(arr_delay) over d30 as delay_30d, sum(gained) over d30 as gained_30d
    from (
        select
            carrier, flight, day, max(seen_at) as seen_at, sum(arrived) as arrived,
            sum(arr_late) as arr_late, sum(arr_delay) as arr_delay, sum(gained) as gained
        from days
        group by carrier, flight, day
    ) as line
    window
        ever as (partition by carrier, flight order by day rows between unbounded preceding and current row),
        d30 as (partition by carrier, flight order by day range between 29 preceding and current row)
),

-- The aircraft's last departure from New York: how late it left, and when it can be back for this one.
tail_now as (
    select
        tailnum, at, asked,
        last_value(departed) ignore nulls over ever as departed,
        last_value(delay) ignore nulls over ever as delay,
        last_value(back) ignore nulls over ever as back
    from (
        select
            tailnum, unix_timestamp(departed_at) as at, 0 as asked,
            unix_timestamp(departed_at) as departed, max(dep_delay) as delay,
            unix_timestamp(departed_at) + max(120 * block_minutes) as back
        from flights
        where departed_at is not null and tailnum is not null
        group by tailnum, unix_timestamp(departed_at)
        union all
        select distinct
            tailnum, asked, 1, cast(null as bigint), cast(null as bigint), cast(null as bigint)
        from questions
        where tailnum is not null
    ) as line
    window ever as (
        partition by tailnum order by at, asked rows between unbounded preceding and current row
    )
)

select
    f.scheduled_at, f.origin, f.carrier, f.flight, f.prediction_time,
    timestamp_seconds(greatest(
        unix_timestamp(f.reading_at), t.departed,
        case when o.seen_at > 600 * (f.tick - 144) then o.seen_at end,
        case when co.seen_at > 600 * (f.tick - 18) then co.seen_at end,
        case when c.seen_at > 600 * (f.tick - 144) then c.seen_at end,
        case when d.seen_at > 600 * (f.tick - 144) then d.seen_at end,
        case when ch.seen_at > 86400 * (f.day - 30) + 28800 then ch.seen_at end,
        case when r.seen_at > 86400 * (f.day - 30) + 28800 then r.seen_at end,
        case when h.seen_at > 86400 * (f.day - 30) + 28800 then h.seen_at end
    )) as known_at,
    case
        when hour(f.local_time) < 10 then 'morning'
        when hour(f.local_time) < 14 then 'midday'
        when hour(f.local_time) < 18 then 'afternoon'
        else 'evening'
    end as part_of_day,
    f.late,
    f.arr_delay as minutes,
    case when f.arr_delay < 0 then 0 when f.arr_delay <= 15 then 1 else 2 end as punctuality,

    f.dest,
    dayofweek(f.local_time) as weekday,
    f.sched_dep_time div 100 * 60 + f.sched_dep_time % 100 as departure_minute,
    f.sched_arr_time div 100 * 60 + f.sched_arr_time % 100 as arrival_minute,
    f.block_minutes, f.distance,
    f.plane_model, f.seats, year(f.scheduled_at) - f.plane_year as plane_age,

    f.temp, f.dewp, f.humid, f.wind_dir, f.wind_speed, f.wind_gust, f.precip, f.pressure, f.visib,

    o.departed_1h as origin_departed_1h,
    o.delay_1h / nullif(o.departed_1h, 0) as origin_delay_1h,
    o.due_1h - o.departed_1h as origin_overdue_1h,
    o.due_3h as origin_due_3h,
    o.delay_3h / nullif(o.departed_3h, 0) as origin_delay_3h,
    o.late_3h / nullif(o.departed_3h, 0) as origin_late_3h,
    (o.due_3h - o.departed_3h) / nullif(o.due_3h, 0) as origin_overdue_3h,
    o.delay_24h / nullif(o.departed_24h, 0) as origin_delay_24h,
    (o.due_24h - o.departed_24h) / nullif(o.due_24h, 0) as origin_overdue_24h,
    co.departed_3h as carrier_origin_departed_3h,
    co.delay_3h / nullif(co.departed_3h, 0) as carrier_origin_delay_3h,
    co.due_3h - co.departed_3h as carrier_origin_overdue_3h,
    c.delay_6h / nullif(c.departed_6h, 0) as carrier_delay_6h,
    c.late_24h / nullif(c.arrived_24h, 0) as carrier_late_24h,
    ch.late_7d / nullif(ch.arrived_7d, 0) as carrier_late_7d,
    ch.late_30d / nullif(ch.arrived_30d, 0) as carrier_late_30d,
    d.departed_6h as dest_departed_6h,
    d.delay_6h / nullif(d.departed_6h, 0) as dest_delay_6h,
    d.arr_delay_6h / nullif(d.arrived_6h, 0) as dest_arr_delay_6h,
    d.due_6h - d.departed_6h as dest_overdue_6h,
    d.late_24h / nullif(d.arrived_24h, 0) as dest_late_24h,
    r.late_7d / nullif(r.arrived_7d, 0) as route_late_7d,
    r.late_30d / nullif(r.arrived_30d, 0) as route_late_30d,
    r.delay_30d / nullif(r.arrived_30d, 0) as route_delay_30d,
    r.gained_30d / nullif(r.arrived_30d, 0) as route_gained_30d,
    h.arrived_30d as flight_arrived_30d,
    h.late_30d / nullif(h.arrived_30d, 0) as flight_late_30d,
    h.delay_30d / nullif(h.arrived_30d, 0) as flight_delay_30d,
    h.gained_30d / nullif(h.arrived_30d, 0) as flight_gained_30d,
    t.delay as tail_delay,
    (f.asked - t.departed) / 3600 as tail_hours,
    (unix_timestamp(f.scheduled_at) - t.back) / 3600 as tail_slack,
    -- From an hour short to two hours in hand the risk falls from near certain to usual, and most of what
    -- a model can know is there: the range in five parts, in minutes, clipped to each.
    least(greatest((unix_timestamp(f.scheduled_at) - t.back) / 60, -60), 0) as tail_slack_m60_0,
    least(greatest((unix_timestamp(f.scheduled_at) - t.back) / 60, 0), 24) as tail_slack_0_24,
    least(greatest((unix_timestamp(f.scheduled_at) - t.back) / 60, 24), 48) as tail_slack_24_48,
    least(greatest((unix_timestamp(f.scheduled_at) - t.back) / 60, 48), 72) as tail_slack_48_72,
    least(greatest((unix_timestamp(f.scheduled_at) - t.back) / 60, 72), 120) as tail_slack_72_120
from questions as f
left join origin_now as o on f.origin = o.origin and f.tick = o.tick
left join carrier_origin_now as co
    on f.carrier = co.carrier and f.origin = co.origin and f.tick = co.tick
left join carrier_now as c on f.carrier = c.carrier and f.tick = c.tick
left join dest_now as d on f.dest = d.dest and f.tick = d.tick
left join carrier_habit as ch on f.carrier = ch.carrier and f.day = ch.day
left join route_habit as r on f.origin = r.origin and f.dest = r.dest and f.day = r.day
left join flight_habit as h on f.carrier = h.carrier and f.flight = h.flight and f.day = h.day
left join tail_now as t
    on f.tailnum = t.tailnum and f.asked = t.at and t.asked = 1
    and t.departed >= f.asked - 86400 * :lookback_days
where f.arr_delay is not null
