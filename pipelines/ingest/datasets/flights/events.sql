-- One row per scheduled departure, with its aircraft and the last weather reading before prediction time.
-- Views: flights, weather, planes, airports, airlines. Parameters: :as_of, :horizon_minutes, :lookback_days,
-- :settle_days. An outcome counts from the moment it was made: what happened at or after :as_of, or so late
-- that no clock may wait for it, is null here.
with scheduled as (
    select
        *,
        timestampadd(minute, sched_dep_time % 100, time_hour) as scheduled_at,
        timestampadd(minute, sched_dep_time % 100 - :horizon_minutes, time_hour) as prediction_time
    from flights
),

local as (
    select
        s.*,
        s.sched_arr_time div 100 * 60 + s.sched_arr_time % 100 as arrival_minute,
        -- Puerto Rico and the Virgin Islands are not in `airports`.
        from_utc_timestamp(s.scheduled_at, coalesce(a.tzone, 'America/Puerto_Rico')) as dest_clock
    from scheduled as s
    left join airports as a on s.dest = a.faa
    where s.scheduled_at < :as_of
),

timed as (
    select
        *,
        timestampadd(minute, dep_delay, scheduled_at) as departed_at,
        -- The scheduled arrival is given on the destination's clock: the first such time after departure.
        pmod(arrival_minute - hour(dest_clock) * 60 - minute(dest_clock), 1440) as block_minutes
    from local
),

arrived as (
    select
        *,
        timestampadd(minute, arr_delay, timestampadd(minute, block_minutes, scheduled_at)) as arrived_at,
        timestampadd(day, :settle_days, scheduled_at) as settled_at,
        least(:as_of, timestampadd(day, :settle_days, scheduled_at)) as told_before
    from timed
),

-- Readings and questions on one line per origin. A question sorts before a reading of the same moment:
-- a reading counts after its hour.
asked as (
    select
        origin, at, kind,
        max(case when kind = 1 then at end) over (
            partition by origin order by at, kind rows between unbounded preceding and current row
        ) as reading_at
    from (
        select origin, time_hour as at, 1 as kind from weather
        union all
        select distinct origin, prediction_time as at, 0 as kind from arrived
    ) as line
)

select
    e.scheduled_at,
    e.origin,
    e.carrier,
    e.flight,
    e.prediction_time,
    e.dest,
    e.tailnum,
    e.sched_dep_time,
    e.sched_arr_time,
    e.block_minutes,
    e.distance,
    case when e.departed_at < e.told_before then e.departed_at end as departed_at,
    -- A delay beyond the day when all is settled is no unknown outcome but a broken row: validate sees it.
    case when e.departed_at < e.told_before or e.departed_at >= e.settled_at then e.dep_delay end as dep_delay,
    case when e.arrived_at < e.told_before then e.arrived_at end as arrived_at,
    case when e.arrived_at < e.told_before or e.arrived_at >= e.settled_at then e.arr_delay end as arr_delay,
    case when e.arrived_at < e.told_before then e.air_time end as air_time,
    case when e.arrived_at < e.told_before then timestampdiff(minute, e.departed_at, e.arrived_at) end
        as elapsed_minutes,
    p.year as plane_year,
    p.manufacturer,
    p.model as plane_model,
    p.seats,
    q.reading_at,
    w.temp,
    w.dewp,
    w.humid,
    w.wind_dir,
    w.wind_speed,
    w.wind_gust,
    w.precip,
    w.pressure,
    w.visib
from arrived as e
left join planes as p on e.tailnum = p.tailnum
left join asked as q
    on e.origin = q.origin and e.prediction_time = q.at and q.kind = 0
    and q.reading_at >= timestampadd(day, -:lookback_days, e.scheduled_at)
left join weather as w on q.origin = w.origin and q.reading_at = w.time_hour
